"""The layers as plain loops, and their comparison with torch, for verify_manual_conv."""
