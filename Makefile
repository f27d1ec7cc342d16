# Short names for scripts/, which need no make.
#   make run ARGS='--set http.port=9000'    make test ARGS='-k config'    make bench BENCH=quick
.PHONY: run test demo install bench lint fmt clean
ARGS =
BENCH =

run:
	@sh scripts/run $(ARGS)
test:
	@sh scripts/test $(ARGS)
demo: install
	@.venv/bin/gateway demo $(ARGS)
install:
	@sh scripts/bootstrap run
bench:
	@sh scripts/bench $(if $(filter quick,$(BENCH)),--quick) $(ARGS)
lint:
	@sh scripts/lint
fmt:
	@sh scripts/lint --fix
clean:
	@sh scripts/clean
