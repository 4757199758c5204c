"""Files on disk: the safetensors container and writes that appear whole or not at all."""
