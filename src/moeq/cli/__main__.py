"""`python -m moeq.cli`."""

from moeq.cli import main

main()
