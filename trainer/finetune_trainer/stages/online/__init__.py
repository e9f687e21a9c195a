"""Online rounds of preference tuning (`online`)."""
