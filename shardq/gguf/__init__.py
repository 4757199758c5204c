"""What a GGUF file says of a model, from its config and side files alone: metadata, vocabulary, names, transforms.

No weight is read here, and nothing is written. Everything follows llama.cpp's converter (`convert_hf_to_gguf.py` as in
llama-cpp-python 0.3.36), and what it takes from transformers 5.23.0 and gguf 0.19.0.
"""
