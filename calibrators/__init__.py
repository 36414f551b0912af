"""Ground floor: images in, a plan of scales out.

What stands here knows nothing of the command line, and, but for the collectors and the formats of other tools, nothing
of ONNX or of any run-time. It turns images and a model whose quantizable places are *sites* into `Ranges`, and ranges
into a `QuantPlan`.
"""
