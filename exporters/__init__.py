"""First floor: a sited model and a plan in, a checked engine out.

What stands here knows ONNX and the run-times. It knows no timm, no generator and no command line.
"""
