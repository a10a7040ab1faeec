"""The commands that push a trained model to the Hugging Face Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.cli.export import DtypeOption, RunArgument, load_named_source
from tiny_lm.console import print_message
from tiny_lm.files import scratch_folder

if TYPE_CHECKING:
    from tiny_lm.export.source import ExportSource

RepoId = Annotated[str, typer.Option(metavar="USER/NAME", help="The repository; created if it does not exist.")]
Private = Annotated[bool, typer.Option("--private", help="Create a private repository.")]
License = Annotated[str, typer.Option("--license", metavar="ID", help="License of the weights, as the Hub names it.")]
Gguf = Annotated[
    str, typer.Option(metavar="TYPE,...", help="Also push GGUF files of these types, such as Q8_0,Q4_K_M.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Export and list the files, without contacting the Hub.")]


def push(
    run: RunArgument,
    repo_id: RepoId,
    private: Private = False,
    license_name: License = "mit",
    gguf: Gguf = "",
    dtype: DtypeOption = "float32",
    dry_run: DryRun = False,
) -> None:
    """Export a run, verify the export and push it to the Hugging Face Hub.

    The token is that of `hf auth login`, or the variable HF_TOKEN. Only weights (safetensors, GGUF), JSON and the model
    card are pushed: never a checkpoint, a pickle or optimizer state.
    """
    from tiny_lm.export.source import load_source

    options = _Options(repo_id, private, license_name, gguf, dtype, dry_run)
    options.push(load_source(run))


def upload_checkpoint(
    repo_id: RepoId,
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file.")],
    model_config: Annotated[str | None, typer.Option(help="Model config; must equal the checkpoint's.")] = None,
    training_config: Annotated[str | None, typer.Option(help="Training config; only validated.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_config: Annotated[
        str | None, typer.Option(help="Tokenizer config; must match the tokenizer folder.")
    ] = None,
    private: Private = False,
    license_name: License = "mit",
    gguf: Gguf = "",
    dtype: DtypeOption = "float32",
    dry_run: DryRun = False,
) -> None:
    """Push a checkpoint and a tokenizer from separate paths to the Hugging Face Hub."""
    from tiny_lm.training import TrainingConfig

    options = _Options(repo_id, private, license_name, gguf, dtype, dry_run)
    if training_config:
        TrainingConfig.from_yaml(training_config)
    options.push(load_named_source(checkpoint, model_config, tokenizer, tokenizer_config))


class _Options:
    """The options of both commands, validated before a model is loaded."""

    def __init__(self, repo_id: str, private: bool, license_name: str, gguf: str, dtype: str, dry_run: bool) -> None:
        """Check the options and, except for a dry run, access to the Hub.

        Raises:
            UserError: an option is invalid, or network or token are missing.
        """
        from tiny_lm.export import hub
        from tiny_lm.export.gguf import check_kinds
        from tiny_lm.export.huggingface import check_dtype

        self.target = hub.Target(repo_id, private)
        self.dtype = check_dtype(dtype)
        hub.check_license(license_name)
        self.license, self.dry_run = license_name, dry_run
        self.kinds = check_kinds(gguf.replace(" ", "").split(",")) if gguf else []
        if not dry_run:
            hub.check_access(self.target)

    def push(self, source: "ExportSource") -> None:
        """Export, verify, list and push."""
        from tiny_lm import __version__
        from tiny_lm.export import hub

        with scratch_folder(name="tiny-lm-push") as temporary:
            files = hub.allowed_files(self._export(source, temporary))
            for file in files:
                print(f"{file.name}  {file.stat().st_size:,} bytes")
            who = "only you may see it" if self.target.private else "everybody may see it"
            total = sum(file.stat().st_size for file in files)
            what = f"{len(files)} files, {total:,} bytes, license {self.license}, to {self.target.url} ({who})"
            if self.dry_run:
                print_message(f"would send {what}")
                return
            print_message(f"sending {what}")
            message = f"{source.name}, step {source.step:,}, as tiny-lm {__version__} exports it"
            print(hub.send(files, self.target, message))

    def _export(self, source: "ExportSource", folder: Path) -> Path:
        from tiny_lm.export.gguf import export_gguf
        from tiny_lm.export.huggingface import export_huggingface
        from tiny_lm.export.model_card import CARD_FILE, model_card
        from tiny_lm.export.verify import REPORT_FILE, show_table
        from tiny_lm.files import write_text

        out = folder / "huggingface"
        show_table(f"{self.target.repo_id} beside {source.name}", export_huggingface(source, out, dtype=self.dtype))
        write_text(out / CARD_FILE, model_card(source, location=self.target.repo_id, license_name=self.license))
        if self.kinds:
            written = folder / "gguf"
            files = export_gguf(source, written, self.kinds)
            show_table(f"float32 GGUF of {source.name} in llama.cpp", files[0].checks)
            (written / REPORT_FILE).rename(out / f"gguf-{REPORT_FILE}")
            for file in written.iterdir():
                file.rename(out / file.name)
        return out
