"""What several tests need: processes, servers, clusters, models, stores and training steps."""
