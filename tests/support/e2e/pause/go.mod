module finetune.dev/tests/assets/pause

go 1.24.0
