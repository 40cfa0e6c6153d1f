"""What runs on Ray: harvest, training, evaluation and export."""
