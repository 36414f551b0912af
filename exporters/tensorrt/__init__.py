"""What the TensorRT backends share: refusals, the builder, the layer table, CUDA and the loaded engine.

TensorRT 10, TensorRT 11 and TensorRT for RTX have one API with differences at the edges. The binding (`tensorrt` or
`tensorrt_rtx`) is passed in as a module and never imported here; what it offers is asked with `hasattr`.
"""
