"""Files in and out, installed versions."""
