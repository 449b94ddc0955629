"""The commands as plain functions, one file each, named as in :mod:`adflow.cli`, which is a skin over them."""
