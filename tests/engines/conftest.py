"""What the tests of other programs start from: runs of every family."""

from tiny_exports import trained_run as trained_run
