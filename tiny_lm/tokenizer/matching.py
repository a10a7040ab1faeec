"""Check that two artifacts belong to the same tokenizer."""

from tiny_lm.errors import UserError


def check_same_tokenizer(
    tokenizer_hash: str,
    expected_hash: str,
    path: object,
    other: object,
    advice: str = "use the one it was trained with",
) -> None:
    """Check that two tokenizer hashes are equal: otherwise the same token ids mean different text.

    Args:
        tokenizer_hash: of the tokenizer of ``path``.
        expected_hash: of the tokenizer of ``other``.
        path: what the error starts with.
        other: what ``path`` must match.
        advice: what to do about it.

    Raises:
        UserError: they differ.
    """
    if tokenizer_hash != expected_hash:
        raise UserError(f"{path}: tokenizer does not match {other}; {advice}")
