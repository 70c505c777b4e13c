"""Running what deploy made: sessions, workspace, pipeline."""
