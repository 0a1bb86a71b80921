"""Known methods that lesa is compared with; one file per kind, each a dict name -> Peer."""
