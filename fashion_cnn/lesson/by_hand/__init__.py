"""What verify_manual_conv does: the layers by loops, beside torch."""
