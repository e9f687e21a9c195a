"""A job's directory in storage: files, complete checkpoints, retries, and fencing between attempts."""
