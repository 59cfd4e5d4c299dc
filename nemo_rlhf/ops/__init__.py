"""Pure maths on tensors: masked statistics, KL, token rewards, GAE, reward scaling.

Everything takes and returns plain tensors of shape [batch, sequence] that are aligned to the tokens as in
``nemo_rlhf.types``, with bool masks, and holds no state, so that each piece is tested alone against its definition.
"""
