"""Operations around a run: planning, storage, export."""
