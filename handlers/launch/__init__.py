"""The parts of ``ade serve`` that all engines share: working folder, processes, page, stop."""
