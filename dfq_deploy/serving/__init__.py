"""Serving: a bundle answers over HTTP, by this package's own server or by NVIDIA Triton Inference Server.

Both speak the KServe v2 inference protocol and offer the same two models: NAME takes the model's own tensor `images`,
NAME_encoded takes JPEG and PNG files as they are. So a client moves from one to the other with nothing but another
address. No torch. `triton` writes the model repository and needs no more than a plain install; `server` and what it
imports need the extra `serve`.
"""

__all__: list[str] = []
