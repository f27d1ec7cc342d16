# Short names for scripts/, which need no make.
#   make run ARGS='--set http.port=9000'    make test ARGS='-k config'    make bench BENCH=quick
#   make bench-peers BENCH=quick            make bench-peers ARGS=--readme
#   make fuzz FUZZ_SECONDS=600              make torture SECONDS=600 SEED=7
#   make loadtest LOAD=quick
.PHONY: run test test-image torture demo install dist bench bench-peers loadtest fuzz lint fmt clean
ARGS =
BENCH =
LOAD =
FUZZ_SECONDS =
SECONDS = 300
SEED =

run:
	@sh scripts/run $(ARGS)
test:
	@sh scripts/test $(ARGS)
test-image:
	@sh scripts/test-image $(ARGS)
dist:
	@sh scripts/dist
torture:
	@sh scripts/torture --seconds $(SECONDS) $(if $(SEED),--seed $(SEED)) $(ARGS)
demo: install
	@.venv/bin/gateway demo $(ARGS)
install:
	@sh scripts/bootstrap run
bench:
	@sh scripts/bench $(if $(filter quick,$(BENCH)),--quick) $(ARGS)
bench-peers:
	@sh scripts/bench-peers $(if $(filter quick,$(BENCH)),--quick) $(ARGS)
loadtest:
	@sh scripts/loadtest $(if $(filter quick,$(LOAD)),--quick) $(ARGS)
fuzz:
	@FUZZ_SECONDS=$(FUZZ_SECONDS) sh scripts/fuzz $(ARGS)
lint:
	@sh scripts/lint
fmt:
	@sh scripts/lint --fix
clean:
	@sh scripts/clean
