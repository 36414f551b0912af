"""Ground floor: images in, a plan of scales out.

What stands here knows nothing of ONNX, of any run-time or of the command line. It turns images and a
model whose quantizable places are *sites* into `Ranges`, and ranges into a `QuantPlan`.
"""
