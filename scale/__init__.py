"""What only models of billions of parameters need: adapters (lora.py), a plan of the memory (memory.py), many processes (sharding.py)."""
