"""Commands that put a trained model on the Hugging Face Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiny_lm.cli.export import DtypeOption, RunArgument, load_named_source
from tiny_lm.console import print_message
from tiny_lm.files import scratch_folder

if TYPE_CHECKING:
    from tiny_lm.export.source import Source

RepoId = Annotated[str, typer.Option(metavar="USER/NAME", help="The repository; it is created if it is not there.")]
Private = Annotated[bool, typer.Option("--private", help="Only you may see it.")]
License = Annotated[str, typer.Option("--license", metavar="ID", help="Of the weights, as the Hub names it.")]
Gguf = Annotated[str, typer.Option(metavar="TYPE,...", help="GGUF files to send as well, such as Q8_0,Q4_K_M.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Export, list what would go, and ask the Hub nothing.")]


def push(
    run: RunArgument,
    repo_id: RepoId,
    private: Private = False,
    license_name: License = "mit",
    gguf: Gguf = "",
    dtype: DtypeOption = "float32",
    dry_run: DryRun = False,
) -> None:
    """Export a run, and put the proven export on the Hugging Face Hub.

    The token is the one that `hf auth login` saved, or the variable HF_TOKEN. Sent are weights (safetensors, GGUF),
    JSON and the model card: never a checkpoint, a pickle or an optimizer's state.
    """
    from tiny_lm.export.source import load_source

    options = _Options(repo_id, private, license_name, gguf, dtype, dry_run)
    options.push(load_source(run))


def upload_checkpoint(
    repo_id: RepoId,
    checkpoint: Annotated[Path, typer.Option(help="A .ckpt file.")],
    model_config: Annotated[str | None, typer.Option(help="Must be the config that the checkpoint carries.")] = None,
    training_config: Annotated[str | None, typer.Option(help="Is checked to be one.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder, or any file in it.")] = None,
    tokenizer_config: Annotated[str | None, typer.Option(help="Must name the kind of the tokenizer folder.")] = None,
    private: Private = False,
    license_name: License = "mit",
    gguf: Gguf = "",
    dtype: DtypeOption = "float32",
    dry_run: DryRun = False,
) -> None:
    """Put a checkpoint and a tokenizer, given one by one, on the Hugging Face Hub."""
    from tiny_lm.training import TrainingConfig

    options = _Options(repo_id, private, license_name, gguf, dtype, dry_run)
    if training_config:
        TrainingConfig.from_yaml(training_config)
    options.push(load_named_source(checkpoint, model_config, tokenizer, tokenizer_config))


class _Options:
    """What both commands are told; whatever is wrong with it is said before a model is loaded."""

    def __init__(self, repo_id: str, private: bool, license_name: str, gguf: str, dtype: str, dry_run: bool) -> None:
        """Check the options, and unless nothing is to be sent the way to the Hub.

        Raises:
            UserError: one is wrong, or there is no network or token.
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

    def push(self, source: "Source") -> None:
        """Export, prove, list, and send."""
        from tiny_lm import __version__
        from tiny_lm.export import hub

        with scratch_folder(name="tiny-lm-push") as temporary:
            files = hub.admitted_files(self._export(source, temporary))
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

    def _export(self, source: "Source", folder: Path) -> Path:
        from tiny_lm.export.gguf import export_gguf
        from tiny_lm.export.huggingface import export_huggingface
        from tiny_lm.export.model_card import CARD_FILE, model_card
        from tiny_lm.export.verify import REPORT_FILE, show_table
        from tiny_lm.files import write_text

        out = folder / "huggingface"
        show_table(f"{self.target.repo_id} beside {source.name}", export_huggingface(source, out, dtype=self.dtype))
        write_text(out / CARD_FILE, model_card(source, place=self.target.repo_id, license_name=self.license))
        if self.kinds:
            written = folder / "gguf"
            files = export_gguf(source, written, self.kinds)
            show_table(f"float32 GGUF of {source.name} in llama.cpp", files[0].checks)
            (written / REPORT_FILE).rename(out / f"gguf-{REPORT_FILE}")
            for file in written.iterdir():
                file.rename(out / file.name)
        return out
