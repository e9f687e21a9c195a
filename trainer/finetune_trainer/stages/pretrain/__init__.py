"""Pretraining, causal or masked (`pretrain`)."""
