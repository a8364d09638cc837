"""Tests of downloads, shards, tokenizers and the offline corpus."""
