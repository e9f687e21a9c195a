"""Reinforcement learning from human feedback: RLOO and GRPO (`rlhf`)."""
