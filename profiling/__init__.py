"""What profile_inference.py is made of: ceilings of the machine, costs of a token, peers, random weights, tables."""
