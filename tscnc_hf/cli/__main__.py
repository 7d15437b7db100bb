"""`python -m tscnc_hf.cli`."""

from tscnc_hf.cli.main import main


raise SystemExit(main())
