"""onnx-ir passes whose broken contracts come out as our own errors."""

import onnx_ir as ir

from calibrators.errors import ExportError

__all__ = ["ContractPass"]


class ContractPass(ir.passes.InPlacePass):
    """An in-place pass; `requires` and `ensures` raise ExportError."""

    def __call__(self, model_or_result: ir.Model | ir.passes.PassResult, /) -> ir.passes.PassResult:
        """Run the pass; a broken contract comes out as the ExportError that says which, not as onnx-ir wraps it."""
        try:
            return super().__call__(model_or_result)
        except (ir.passes.PreconditionError, ir.passes.PostconditionError) as wrapped:
            if isinstance(wrapped.__cause__, ExportError):
                raise wrapped.__cause__ from None
            raise
