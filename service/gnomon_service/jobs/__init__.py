"""What happens to jobs: submitted, leased, moved from state to state, and what they leave."""
