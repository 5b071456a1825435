"""What a trained model is worth on validation data: loss, bits per byte, calibration, shapes of its activations."""
