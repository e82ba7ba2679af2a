"""Loads the demo's folder as a stranger would: a fresh process, stock transformers, no regrow."""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
question = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is a tree?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = model.generate(**question, max_new_tokens=24, do_sample=False)
print(f"{folder} loads with stock transformers as {type(model).__name__}, {model.num_parameters():,} parameters")
print(tokenizer.decode(answer[0, question["input_ids"].shape[1] :], skip_special_tokens=True))
