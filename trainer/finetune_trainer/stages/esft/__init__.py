"""Expert-specialized fine-tuning of mixture-of-experts models (`esft`)."""
