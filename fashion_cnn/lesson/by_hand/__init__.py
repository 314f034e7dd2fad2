"""What verify_manual_conv does: the layers by loops, compared with torch."""
