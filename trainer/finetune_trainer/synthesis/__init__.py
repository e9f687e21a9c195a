"""Training data made with a teacher: what is asked, what is kept of the answers, and why the rest is not."""
