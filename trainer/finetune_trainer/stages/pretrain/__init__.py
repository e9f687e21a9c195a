"""Causal or masked language model pretraining (`pretrain`)."""
