"""Who is asking: keys and what they allow."""
