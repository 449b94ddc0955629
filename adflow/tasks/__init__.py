"""The commands as plain functions, one file each, named as in :mod:`adflow.cli`; the command line is a skin over them."""
