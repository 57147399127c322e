"""What a quantization will take: memory, time and disk, from the config alone, before anything runs."""
