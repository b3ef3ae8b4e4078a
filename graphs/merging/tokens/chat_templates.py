"""Chat templates by name: the formats that many models share, as Jinja text that transformers renders."""

from __future__ import annotations

CHATML = ("{%- for message in messages -%}\n"
          "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>{{ '\\n' }}\n"
          "{%- endfor -%}\n"
          "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\\n' }}{%- endif -%}")
"""Every message between ``<|im_start|>ROLE`` and ``<|im_end|>``."""
ALPACA = ("{%- set titles = {'user': '### Instruction:', 'assistant': '### Response:',"
          " 'user_context': '### Input:'} -%}\n"
          "{%- for message in messages -%}\n"
          "{%- if message['role'] in titles -%}{{ titles[message['role']] + '\\n' }}{%- endif -%}\n"
          "{{ message['content'] | trim }}{{ '\\n\\n' if not loop.last or add_generation_prompt else '' }}\n"
          "{%- endfor -%}\n"
          "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}")
"""Titled paragraphs; a system message comes first, without a title."""
LLAMA3 = ("{{- bos_token -}}\n"
          "{%- for message in messages -%}\n"
          "<|start_header_id|>{{ message['role'] }}<|end_header_id|>{{ '\\n\\n' }}"
          "{{ message['content'] | trim }}<|eot_id|>\n"
          "{%- endfor -%}\n"
          "{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>{{ '\\n\\n' }}{%- endif -%}")
"""A header with the role before every message, ``<|eot_id|>`` after it."""
MISTRAL = ("{{- bos_token -}}\n"
           "{%- set system = messages | selectattr('role', 'equalto', 'system') | map(attribute='content')"
           " | join('\\n\\n') -%}\n"
           "{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}\n"
           "{%- for message in turns -%}\n"
           "{%- if message['role'] == 'user' -%}\n"
           "[INST] {{ system + '\\n\\n' if system and loop.first else '' }}{{ message['content'] }} [/INST]\n"
           "{%- else -%}\n"
           "{{ ' ' + message['content'] + eos_token }}\n"
           "{%- endif -%}\n"
           "{%- endfor -%}")
"""User messages between ``[INST]`` and ``[/INST]``, a system message within the first of them."""
EXAONE = ("{%- for message in messages -%}\n"
          "[|{{ message['role'] }}|]{{ message['content'] }}"
          "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}\n"
          "{%- endfor -%}\n"
          "{%- if add_generation_prompt -%}[|assistant|]{%- endif -%}")
"""``[|ROLE|]`` before every message, ``[|endofturn|]`` after those that are not the user's."""

NAMED = {"alpaca": ALPACA, "chatml": CHATML, "exaone": EXAONE, "llama3": LLAMA3, "mistral": MISTRAL}
"""Templates by the names that recipes give them (mergekit's)."""
