"""What the commands that work on a cluster are made of. The Kubernetes client loads only when one of them runs."""
