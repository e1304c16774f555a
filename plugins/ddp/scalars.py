"""What the loggers of frameworks are given of a report."""

from gcompress.exchange.report import Report


def report_scalars(report: Report) -> dict[str, float]:
    """{name: number} of a report's figures, for TensorBoard and its like."""
    figures = report.as_dict()
    shown = ("ratio", "last_step_bytes", "sent_bytes", "wire_bytes", "fp32_bytes")
    return {f"gcompress/{name}": figures[name] for name in shown}
