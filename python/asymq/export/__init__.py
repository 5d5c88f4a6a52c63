"""From a trained model to where it runs: a file or folder that others read, and a report."""

from asymq.export.checkpoint import export_checkpoint
from asymq.export.encodings import export_encodings
from asymq.export.onnx import export_onnx
from asymq.export.report import ExportReport, Row

__all__ = ["ExportReport", "Row", "export_checkpoint", "export_encodings", "export_onnx"]
