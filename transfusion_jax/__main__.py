from transfusion_jax.cli import main

raise SystemExit(main())
