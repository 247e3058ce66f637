"""One optimizer step: pairs → forwards → loss → gradient."""
