"""What a long run needs: storage that survives a kill, a plan, checks, export, the command line."""
