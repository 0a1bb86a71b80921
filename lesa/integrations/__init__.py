"""lesa inside other engines: one adapter per engine, each imports its engine when it is used."""
