"""Forks under memory pressure: leases as locks in SGLang's tree, and the order of its queue. `memory` decides."""
