"""The command ``tiny-lm export torchserve``."""

from typing import Annotated

import typer

from tiny_lm.cli.export import DtypeOption, Force, OutputDir, RunArgument
from tiny_lm.console import print_message, shell_command


def export_torchserve(
    run: RunArgument,
    output_dir: OutputDir,
    dtype: DtypeOption = "float32",
    port: Annotated[
        int, typer.Option(min=1, max=65531, help="Port of predictions; the next four are used, too.")
    ] = 8080,
    force: Force = False,
) -> None:
    """Export an archive (.mar) for TorchServe, and its configuration."""
    from tiny_lm.export import torchserve
    from tiny_lm.export.huggingface import check_dtype
    from tiny_lm.export.source import load_source
    from tiny_lm.export.verify import show_table

    kind, source = check_dtype(dtype), load_source(run)
    checks = torchserve.export_torchserve(source, output_dir, dtype=kind, port=port, force=force)
    show_table(f"{output_dir} beside {source.name}", checks)
    for file in sorted(output_dir.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    print_message(f"next: {shell_command(*torchserve.serve_words(output_dir, source))}")
